"""Training and evaluation of Scala networks (needs the ``train`` extra)."""
