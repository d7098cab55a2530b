"""The fused execution plan: the same networks with hand-written derivatives, in native code on a CPU.

`features` and `head` are what backbone and heads call; both return None where the plan does not apply. The training
loop makes its forward passes within `gradients_in_place`. `backbone.py` explains the passes.
"""

from ndem_zoo.fused.autograd import gradients_in_place
from ndem_zoo.fused.backbone import features
from ndem_zoo.fused.heads import run as head

__all__ = ["features", "gradients_in_place", "head"]
