"""Calibration: prompts, the amax of activations, sensitivity of groups of layers."""
