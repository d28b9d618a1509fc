"""f, the one layer of an MDEQ."""

from torch import nn
from torch.nn.functional import relu

from .fusion import MultiscaleFusion
from .residual import ResidualBlock, conv, group_norm


class MultiscaleFunction(nn.Module):
    """The map whose equilibrium is the output of an MDEQ (Bai et al. 2020).

    Residual blocks on each branch, fusion across branches, and a convolution with
    a norm on each branch.

    Args:
        channels (Sequence[int]): Channels of each branch, highest resolution
            first.
        num_blocks (Sequence[int]): Residual blocks of each branch. The injection
            enters the first.
        num_groups (int): Groups of the norms; those after the fusion have half
            as many.
        expansion (int): Factor of the channels inside the residual blocks.
        post_gn_affine (bool): Whether the norms after the fusion are affine.
        weight_norm (bool): Whether the convolutions of the blocks and after the
            fusion are weight-normalised.
        injected (int): Number of branches that the image enters, from the first on.
    """

    def __init__(
        self,
        channels,
        num_blocks,
        num_groups,
        expansion,
        post_gn_affine,
        weight_norm=True,
        injected=1,
    ):
        super().__init__()
        self.injected = injected
        self.branches = nn.ModuleList(
            nn.ModuleList(
                ResidualBlock(c, expansion, num_groups, weight_norm)
                for _ in range(blocks)
            )
            for c, blocks in zip(channels, num_blocks, strict=True)
        )
        self.fusion = MultiscaleFusion(channels, num_groups)
        self.post_convs = nn.ModuleList(
            conv(1, c, c, weight_norm=weight_norm) for c in channels
        )
        self.post_norms = nn.ModuleList(
            group_norm(num_groups // 2, c, post_gn_affine) for c in channels
        )

    def forward(self, maps, *inputs):
        """Evaluate f.

        Args:
            maps (list[Tensor]): The state, (N, C_i, H_i, W_i).
            *inputs (Tensor): The injection of each branch that the image enters,
                (N, C_i, H_i, W_i), then a dropout mask for each block of each branch
                in turn, (N, C_i, 1, 1), or none at all.

        Returns:
            list[Tensor]: Of the shapes of ``maps``.
        """
        injections, masks = inputs[: self.injected], iter(inputs[self.injected :])
        out = []
        for i, (x, blocks) in enumerate(zip(maps, self.branches, strict=True)):
            for k, block in enumerate(blocks):
                enters = injections[i] if i < self.injected and k == 0 else None
                x = block(x, enters, next(masks, None))
            out.append(x)
        fused = self.fusion(out)
        return [
            norm(conv(relu(x)))
            for x, conv, norm in zip(
                fused, self.post_convs, self.post_norms, strict=True
            )
        ]
