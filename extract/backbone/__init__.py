"""Any timm image model as a frozen backbone: weights, folding, packing, precision."""

from extract.postponed import postpone_compiler

postpone_compiler()  # before timm, which imports torchvision
