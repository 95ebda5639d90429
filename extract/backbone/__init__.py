"""Any timm image model as a frozen backbone: weights, and the engine that runs it."""

from extract.postponed import postpone_compiler

postpone_compiler()  # before timm, which imports torchvision
