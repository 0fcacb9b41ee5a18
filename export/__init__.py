"""From a Stable Diffusion 3.5 checkpoint to ONNX components, without loading the model."""
