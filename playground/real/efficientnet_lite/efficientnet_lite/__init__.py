"""EfficientNet-Lite0 as a vision tower: a plug-in of `llava.vision_towers`."""
