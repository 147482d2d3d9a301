"""The Open Inference Protocol (V2): bytes, tensors and the model's description. HTTP is in ``routes/oip.py``."""
