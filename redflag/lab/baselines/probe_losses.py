"""What probes are trained with: pure functions of logits along padded responses, and their smoothing.

Shapes: B responses of T steps, padded on the right; `mask_BT` is true where there is a step.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, pad

from redflag.weights.precision import widest

Reading = Literal["sum", "pooled"]


def token_bce(logits_BT: Tensor, labels_BT: Tensor, mask_BT: Tensor, weights_BT: Tensor) -> Tensor:
    """Binary cross-entropy at every step, weighted, per step that counts.

    Args:
        labels_BT: 1 where harm has begun (or where the response is harmful), else 0.
        weights_BT: A weight for each step, 1 on average.
    """
    losses = binary_cross_entropy_with_logits(logits_BT, labels_BT.to(logits_BT), reduction="none")
    return (losses * weights_BT * mask_BT).sum() / mask_BT.sum().clamp_min(1)


def swim(logits_BT: Tensor, window: int) -> Tensor:
    """Sliding-window mean: at each step the mean of the last `window` logits (section 3b, CC++, arXiv 2601.04603).

    Before `window` steps are there, the mean of those that are.

    >>> swim(torch.tensor([[1.0, 2.0, 3.0, 5.0]]), 2).tolist()
    [[1.0, 1.5, 2.5, 4.0]]
    """
    steps = logits_BT.shape[1]
    # In double precision where there is one: differences of long sums lose digits.
    sums = pad(logits_BT.to(widest(logits_BT.device)).cumsum(1), (1, 0))
    ends = torch.arange(1, steps + 1, device=logits_BT.device)
    begins = (ends - window).clamp_min(0)
    return ((sums[:, ends] - sums[:, begins]) / (ends - begins)).to(logits_BT)


def softmax_weighted(
    logits_BT: Tensor, mask_BT: Tensor, harmful_B: Tensor, window: int, temperature: float, reading: Reading = "sum"
) -> Tensor:
    """The loss of the CC++ probe for each response, shape (B,) (arXiv 2601.04603).

    With z the smoothed logits (`swim`) and w = softmax(z / temperature) over the steps from `window` on (of a response
    that is shorter, its last step alone):

    * `sum`: sum over t of w_t BCE(y, sigmoid(z_t)), as two of three notes of the paper give it;
    * `pooled`: BCE(y, sigmoid(sum over t of w_t z_t)), as the third one words it.

    A temperature towards 0 takes the greatest z alone, one towards infinity the mean.
    """
    smooth = swim(logits_BT, window)
    lengths = mask_BT.sum(1, keepdim=True)
    steps = torch.arange(1, logits_BT.shape[1] + 1, device=logits_BT.device)
    counted = mask_BT & (steps >= torch.minimum(lengths, torch.tensor(window, device=logits_BT.device)))
    weights = torch.softmax((smooth / temperature).masked_fill(~counted, -torch.inf), dim=1)
    labels = harmful_B.to(smooth)
    if reading == "pooled":
        return binary_cross_entropy_with_logits((weights * smooth).sum(1), labels, reduction="none")
    losses = binary_cross_entropy_with_logits(smooth, labels[:, None].expand_as(smooth), reduction="none")
    return (weights * losses).sum(1)


def towards_maximum(logits_BT: Tensor, omega: float) -> Tensor:
    """(1 - omega) logits + omega their cumulative maximum (section 3, arXiv 2501.18837).

    >>> towards_maximum(torch.tensor([[1.0, 0.0, 2.0]]), 0.5).tolist()
    [[1.0, 0.5, 2.0]]
    """
    return (1 - omega) * logits_BT + omega * logits_BT.cummax(1).values


def ema(logits_T: npt.NDArray[np.floating], decay: float, start: float) -> npt.NDArray[np.float64]:
    """Exponential moving average, `decay` being the weight of the newest value, from `start` before the first.

    >>> ema(np.array([1.0, 1.0]), 0.5, 0.0).tolist()
    [0.5, 0.75]
    """
    smooth = np.empty(len(logits_T))
    state = start
    for t, value in enumerate(logits_T):
        state += decay * (float(value) - state)
        smooth[t] = state
    return smooth
