"""EfficientDet: backbone, BiFPN and heads put together from a configuration."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..fused.module import PackedModule
from .bifpn import BiFPN
from .configs import ModelConfig
from .efficientnet import EfficientNet
from .heads import CLASS_PRIOR_BIAS, Head


class EfficientDet(nn.Module):
    """EfficientDet (Tan, Pang & Le 2020) with effdet's state-dict keys.

    In training mode, or when a gradient is needed, it is made of PyTorch's layers. In eval mode
    without gradients (``torch.no_grad()`` or ``torch.inference_mode()``) each part runs on fused
    ops, with batch norms folded and weights packed once; see
    :class:`edet.fused.module.PackedModule`.

    Args:
        config: the network's configuration.
        backbone: a module that maps images to one map per pyramid level from ``config.min_level``
            up, instead of the EfficientNet that ``config`` names.
        backbone_channels: the channels of its maps; ``backbone.channels`` when None.

    Attributes:
        backbone, fpn, class_net, box_net: the parts.

    Raises:
        ValueError: the configuration's levels do not fit the backbone, or the channels of a
            backbone are not known.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        backbone: nn.Module | None = None,
        backbone_channels: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if backbone is None:
            if config.max_level < 5 or config.min_level > 5:
                raise ValueError(
                    f"levels of {config.backbone} must be min_level ≤ 5 ≤ max_level, "
                    f"got {config.min_level} and {config.max_level}"
                )
            backbone = EfficientNet(
                config.backbone,
                levels=range(config.min_level, 6),
                padding=config.padding,
                activation=config.activation,
                bn_eps=config.backbone_bn_eps,
                bn_momentum=config.backbone_bn_momentum,
            )
        channels = backbone_channels or getattr(backbone, "channels", None)
        if channels is None:
            raise ValueError(
                "backbone_channels must give the channels of the backbone's maps, "
                f"got None and {type(backbone).__name__} has no attribute `channels`"
            )
        self.config = config
        self.backbone = backbone
        self.fpn = BiFPN(
            channels,
            config.width,
            config.cells,
            levels=config.levels,
            fusion=config.fusion,
            fusion_per_channel=config.fusion_per_channel,
            pool=config.padding,
            activation=config.activation,
            redundant_bias=config.redundant_bias,
        )

        def head(outputs: int, prior_bias: float) -> Head:
            return Head(
                config.width,
                config.num_anchors * outputs,
                repeats=config.head_repeats,
                levels=config.levels,
                activation=config.activation,
                redundant_bias=config.redundant_bias,
                bn_level_first=config.head_bn_level_first,
                prior_bias=prior_bias,
            )

        self.class_net = head(config.num_classes, CLASS_PRIOR_BIAS)
        self.box_net = head(4, 0.0)

    def forward(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Class logits and box regressions of every anchor.

        Args:
            images: (N, 3, H, W) of the model's dtype, normalised by ``config.mean`` and ``std``;
                any height and width.

        Returns:
            Per level class logits (N, anchors·classes, H_l, W_l) and box regressions
            (N, anchors·4, H_l, W_l); channels are anchor-major, a box is ty, tx, th, tw.

        Raises:
            TypeError, ValueError: naming the argument, what it must be and what it was.
        """
        pyramid = self.fpn(self.backbone(images))
        return self.class_net(pyramid), self.box_net(pyramid)

    def freeze(self) -> EfficientDet:
        """Makes the weights constants for the fastest repeated calls; returns the model.

        See :meth:`edet.fused.module.PackedModule.freeze`, which this calls for every part.
        """
        for module in self.modules():
            if isinstance(module, PackedModule):
                module.freeze()
        return self

    def unfreeze(self) -> EfficientDet:
        """Undoes :meth:`freeze`, except for the eval mode; returns the model."""
        for module in self.modules():
            if isinstance(module, PackedModule):
                module.unfreeze()
        return self
