"""Contrastive unlikelihood training (CUT): learn from judgments, token by token."""
