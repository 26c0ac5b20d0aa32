"""What turns codes into the first hidden states.

Shape legend: B batch, S sequence, K bits, D hidden; `h` the inner width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_bitlm.method.codes import BinaryCode


class CodeMLP(nn.Module):
    """Position-wise MLP on codes in place of an embedding table (BitLM eq. 7): K -> h -> D, GELU (tanh form).

    With identity codes the bits of an id predict nothing linearly, so this layer must act as a lookup table
    made of
    random features: it wants width, and biases, without which phi and -phi would get nearly opposite states.

    Args:
        num_bits: K.
        inner_size: h.
        hidden_size: D.
        init_std: standard deviation of the output weights at the start; hidden states then have init_std *
            sqrt(0.92 h).
        dtype: of the parameters.
    """

    keyed_init = True

    def __init__(
        self,
        num_bits: int,
        inner_size: int,
        hidden_size: int,
        *,
        init_std: float = 0.02,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.init_std = init_std
        self.fc1 = nn.Linear(num_bits, inner_size, dtype=dtype, device=device)
        self.fc2 = nn.Linear(inner_size, hidden_size, dtype=dtype, device=device)

    def reset_parameters(self) -> None:
        """Inner values of order one on +-1 codes, so that GELU bends; output weights of `init_std`."""
        nn.init.normal_(self.fc1.weight, std=self.fc1.in_features**-0.5)
        nn.init.normal_(self.fc1.bias, std=1.0)
        nn.init.normal_(self.fc2.weight, std=self.init_std)
        nn.init.zeros_(self.fc2.bias)

    def forward(self, codes_BSK: Tensor) -> Tensor:
        """Codes [B, S, K] of +-1 (any float dtype) -> hidden states [B, S, D]."""
        inner = F.gelu(self.fc1(codes_BSK.to(self.fc1.weight.dtype)), approximate="tanh")
        return self.fc2(inner)


class CodeEmbedding(nn.Module):
    """A true embedding table on the ids that the codes spell (ablation of eq. 7); V x D parameters.

    Args:
        code: maps codes to ids. A code that spells no id (bit flips) reads the nearest id's row.
        hidden_size: D.
        init_std: of the rows.
        dtype: of the parameters.
    """

    keyed_init = True

    def __init__(
        self,
        code: BinaryCode,
        hidden_size: int,
        *,
        init_std: float = 0.02,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.code, self.init_std = code, init_std
        self.table = nn.Embedding(code.vocab_size, hidden_size, dtype=dtype, device=device)

    def reset_parameters(self) -> None:
        """Draws the rows from N(0, init_std^2)."""
        nn.init.normal_(self.table.weight, std=self.init_std)

    def forward(self, codes_BSK: Tensor) -> Tensor:
        """Codes [B, S, K] of +-1 -> hidden states [B, S, D]."""
        return self.table(self.code.decode(codes_BSK))
