"""What prefix-tuning is compared with (paper section 5): fine-tuning, all weights of the model trained."""

from torch import nn

from minprefix.files import InputError


class Finetune(nn.Module):
    """All weights under training, in the place of a `Prefix`: calling it gives the model no prefix.

    The model's weights must be float32: steps of a usual learning rate are lost in bfloat16's eight bits. Products in
    bfloat16 are autocast's to make.
    """

    position_offset = 0

    def __init__(self, model):
        super().__init__()
        if any(p.dtype.itemsize < 4 for p in model.parameters()):
            raise InputError("the weights to be fine-tuned are of half precision: load the model in float32")
        self.model = model.requires_grad_(True)

    def forward(self):
        return None
