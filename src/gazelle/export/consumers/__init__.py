"""Programs that read exports, asked the same questions as the model in memory. Each runs in a process of its own.

A consumer gets a request, a dict:

    lora      an adapter as a GGUF file, to be put on the model at `path`
    path      the export, a file or a folder
    texts     strings to tokenise, special tokens written in them taken as such
    chats     conversations to render with the export's own template, and to tokenise
    prompts   lists of ids to answer, taking the likeliest token each time
    tokens    how many tokens an answer may have
    stops     ids at which an answer ends; null, of llama.cpp alone: those it stops at by itself
    rows      {"ids": [...], "at": [...]}: positions whose next token is to be given its logarithm of probability
    kept      for how many of these positions, counted over all rows, whole logits are wanted
    threads   how many to compute with

and gives a dict with `consumer` (its name and version), `texts`, `chats` (ids of each, or null where it cannot),
`ends` (the ids it stops at by itself, or null), `answers` (ids, the token that ended one included), `logprobs` and
`likeliest` (a list a row); of llama.cpp also `seconds` (to the first token and to the end of each answer) and `memory`
(most bytes in use), and the kept logits as a float32 array [kept, vocabulary], or None where it has none.
"""
