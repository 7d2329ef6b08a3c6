"""Layers built on `cross_attention`: plain `nn.Module`s whose projections are called, never read."""
