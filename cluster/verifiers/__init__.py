"""Verifiers: whether a written text is right. Pure functions of texts; nothing that a text contains is executed."""
