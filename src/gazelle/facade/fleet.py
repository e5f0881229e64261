"""How a model is served by a fleet: vLLM's command, and when it is time for it."""

from gazelle.export.vllm import SETTINGS, serve_command
from gazelle.facade.exporting import parse_targets

_WHEN = """\
One process of `gazelle serve` answers from one GPU or CPU, as one batch of at most --max-running answers.
Move to vLLM when
  - the queue stands: gazelle_queue_answers stays above 0, or requests are refused with 429;
  - several GPUs, or machines behind a load balancer, are to share the requests;
  - prompts share long beginnings or contexts reach tens of thousands of tokens, and memory for them is short."""


def fleet_advice(model_name: str) -> str:
    """When to move to vLLM, and the commands: that of an export that is there already, or those that make one.

    Raises:
        OutputError: an export could not be written beside the model.
    """
    target, = parse_targets(model_name, ["vllm"])
    if (target.folder / SETTINGS).exists():
        return f"{_WHEN}\n\n{serve_command(target.folder)}"
    return f"{_WHEN}\n\ngazelle export {model_name} --to vllm\n{target.folder}/serve.sh"
