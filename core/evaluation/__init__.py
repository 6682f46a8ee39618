"""How good a pruned pipeline is, beside dense, uniform, fewer steps and magnitude."""
