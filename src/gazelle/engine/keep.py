"""What a layer keeps between its forward and its backward pass.

No choice changes a bit of any number, but for chunks: summed chunk by chunk, the gradients of the MLP's parameters may
differ in their last bits.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Keep:
    """A layer's choice. Its input is always kept; so is the stream between attention and MLP if either is kept here.

    Attributes:
        attention: queries, keys, values and the attention's output; else they are made again. With dropout of
            attention weights they are kept all the same.
        mlp: gate and up; else they are made again.
        host: the input, and the stream between attention and MLP, lie in pinned host memory.
        attention_host: with `host`, queries, keys, values and the attention's output lie there as well. The stream
            between the halves does not: to make it again takes less time than to fetch it.
        chunk: tokens that the MLP takes at a time, where gate and up are not kept; None for all.
    """

    attention: bool = True
    mlp: bool = True
    host: bool = False
    chunk: int | None = None
    attention_host: bool = False


KEEP = Keep()
MLP = Keep(mlp=False)  # by what is made again
ATTENTION = Keep(attention=False)
ALL = Keep(attention=False, mlp=False)
OFFLOAD = Keep(attention=False, mlp=False, host=True)
AWAY = Keep(host=True, attention_host=True)
CHOICES = {"keep": KEEP, "mlp": MLP, "all": ALL, "offload": OFFLOAD}
