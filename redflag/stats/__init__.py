"""AUROC, rates, intervals and curves."""
