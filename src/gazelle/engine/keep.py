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
        qkv: with `attention`, queries, keys and values; else these are made again, from the input, and the attention's
            output is kept. For long rows, in which attention takes most of the time.
        host: the input, and the stream between attention and MLP, lie in pinned host memory.
        attention_host: with `host`, what is kept of the attention lies there as well. The stream between the halves
            does not: to make it again takes less time than to fetch it.
        chunk: tokens that the MLP takes at a time, where gate and up are not kept; None for all.
    """

    attention: bool = True
    mlp: bool = True
    host: bool = False
    chunk: int | None = None
    attention_host: bool = False
    qkv: bool = True


KEEP = Keep()
MLP = Keep(mlp=False)  # by what is made again
ATTENTION = Keep(attention=False)
ALL = Keep(attention=False, mlp=False)
OFFLOAD = Keep(attention=False, mlp=False, host=True)
AWAY = Keep(host=True, attention_host=True)
OUTPUT = Keep(qkv=False)
OUTPUT_AWAY = Keep(host=True, attention_host=True, qkv=False)
CHOICES = {"keep": KEEP, "mlp": MLP, "all": ALL, "offload": OFFLOAD}
