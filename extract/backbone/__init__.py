"""Any timm image model as a frozen backbone: weights, and the engine that runs it."""

from extract.lazy_dynamo import defer_dynamo_import

defer_dynamo_import()  # before timm, which imports torchvision
