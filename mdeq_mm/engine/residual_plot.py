"""A picture of how the residuals of many solves fall."""

import matplotlib
import numpy as np
import torch

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class ResidualPlot:
    """Collects the traces of a layer's solves, and draws their quantiles.

    Args:
        layer (EquilibriumLayer): Traced until :meth:`stop`.
        most (int): Samples at most.

    Attributes:
        traces (list[Tensor]): (steps, N) each.
    """

    def __init__(self, layer, most):
        self.layer, self.most = layer, most
        self.traces, self._count = [], 0
        self._previous, layer.trace = layer.trace, True
        self._handle = layer.register_forward_hook(self._add)

    def _add(self, layer, inputs, output):
        trace = layer.last_solution.trace
        if trace is None or self._count >= self.most:
            return
        trace = trace[:, : self.most - self._count].cpu()
        self.traces.append(trace)
        self._count += trace.shape[1]
        if self._count >= self.most:
            layer.trace = self._previous

    def stop(self):
        """Leave the layer as it was."""
        self._handle.remove()
        self.layer.trace = self._previous

    def quantiles(self):
        """Quantiles of the residual over the evaluations.

        Returns:
            np.ndarray: (len(QUANTILES), steps). Samples that stopped count with the
            last residual they had.
        """
        longest = max(len(trace) for trace in self.traces)
        columns = []
        for trace in self.traces:
            missing = trace.new_full((longest - len(trace), trace.shape[1]), np.nan)
            columns.append(torch.cat([trace, missing]))
        values = torch.cat(columns, dim=1).numpy()
        for i in range(1, longest):
            values[i] = np.where(np.isnan(values[i]), values[i - 1], values[i])
        return np.quantile(values, QUANTILES, axis=1, method='nearest')

    def draw(self, title):
        """Draw the quantiles.

        Args:
            title (str): Above the picture.

        Returns:
            np.ndarray: (H, W, 3), uint8, RGB.
        """
        # Past pyplot: no figure of the user is touched, nor the backend chosen.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        figure = Figure(figsize=(7, 4.5), dpi=100, layout='constrained')
        canvas = FigureCanvasAgg(figure)
        axis = figure.add_subplot()
        lines = self.quantiles()
        steps = np.arange(1, lines.shape[1] + 1)
        colours = matplotlib.colormaps['viridis'](np.linspace(0.9, 0.1, len(lines)))
        for line, share, colour in zip(lines, QUANTILES, colours, strict=True):
            shown = np.where(np.isfinite(line) & (line > 0), line, np.nan)
            axis.semilogy(
                steps,
                shown,
                color=colour,
                marker='.',
                label=f'{share:.0%} of images',
            )
        axis.set(
            xlabel='evaluations of f',
            ylabel='residual of no more than',
            title=f'{title}, {self._count} images',
        )
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.grid(alpha=0.3)
        # In the order of the lines, from above.
        handles, labels = axis.get_legend_handles_labels()
        axis.legend(handles[::-1], labels[::-1], frameon=False)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()
