"""What computes beside the experts: a GPU, or a thread in its place; and the hand-off between the two."""

from hybrid_k2.accelerator.base import Accelerator, Handoff, Label
from hybrid_k2.accelerator.handoff_direct import DirectHandoff
from hybrid_k2.accelerator.handoff_mailbox import MailboxHandoff
from hybrid_k2.accelerator.handoff_submit import SubmitHandoff
from hybrid_k2.accelerator.hot import HotExperts, TwinHotExperts
from hybrid_k2.accelerator.inline import InlineAccelerator
from hybrid_k2.accelerator.slots import TimeLimit
from hybrid_k2.accelerator.trace import Trace, check_trace_file
from hybrid_k2.accelerator.twin import HostTwin

__all__ = [
    "Accelerator",
    "DirectHandoff",
    "Handoff",
    "HostTwin",
    "HotExperts",
    "InlineAccelerator",
    "Label",
    "MailboxHandoff",
    "SubmitHandoff",
    "TimeLimit",
    "Trace",
    "TwinHotExperts",
    "check_trace_file",
]
