"""Whether and how a model fits a device, before it is built."""
