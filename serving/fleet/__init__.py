"""Drawing by replicas of a distributed engine, behind the HTTP server's endpoints.

:mod:`sd35_trt.serving.ray_app` has Ray Serve run them.
"""
