"""Any timm image model as a frozen backbone: weights, folding, packing, precision."""
