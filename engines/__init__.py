"""From ONNX components to engines, and from engines to a bundle."""
