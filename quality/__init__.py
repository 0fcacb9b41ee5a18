"""How close a bundle draws to another: the report of ``sd35-trt verify --against``."""
