"""Evaluation: the HotpotQA memory, retrieval, answers and cost, each beside named peers in one run."""
