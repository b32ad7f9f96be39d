"""The corpus of egs/mini and the small models that stand for pretrained ones."""
