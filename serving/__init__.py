"""The HTTP server: pictures in OpenAI's form, over a pool.

``sd35-trt serve`` runs it; :func:`sd35_trt.serving.app.make_app` makes it as an ASGI application
for other servers.
"""
