"""``vlmpo serve``: transformers' chat server for one model, loaded and shown its images as in training."""

from __future__ import annotations

import os
import socket
from typing import Any

import numpy as np
import torch
from transformers.utils.import_utils import is_serve_available

from vlmpo.commands.trained import find_trained, load_trained, place_of
from vlmpo.data.encode.images import open_image
from vlmpo.errors import RunError
from vlmpo.log import logger, shown
from vlmpo.models.adapters import unwrap_peft

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve(model: str, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serve a model by the OpenAI-compatible chat API until the process is stopped.

    Args:
        model: a run folder, a checkpoint, a model folder or adapter, or a Hub name.
        host: the address to listen on.
        port: of the address.

    Raises:
        VlmpoError: there is no such model yet, it cannot be loaded, the server's packages are missing, or the address
            cannot be listened on.
    """
    if not is_serve_available():
        raise RunError("vlmpo serve needs fastapi, uvicorn and openai: pip install 'vlmpo[serve]'")
    trained = find_trained(model)
    with _listening(host, port) as listener:  # before a large model is loaded
        policy, processor = load_trained(trained)
        logger.info(f"model: {trained.what}")
        where = f"[{host}]" if ":" in host else host
        logger.info(f"serving {place_of(trained)} on http://{where}:{listener.getsockname()[1]}/v1, to Ctrl-C")
        if host not in LOOPBACK:
            logger.warning(
                "warning: whoever can reach that address can ask the model, and have it open images that this "
                "machine can read or fetch: the server asks for no key"
            )
        _decode_as_in_training()
        _server(unwrap_peft(policy), processor, place_of(trained)).run(sockets=[listener])


def _listening(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to the address. Raise RunError if it is taken, or not this machine's."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        raise RunError(
            f"cannot listen on {shown(host)}, port {port}: {reason}; name others by --host and --port"
        ) from None


def _decode_as_in_training() -> None:
    """Let the server's image processors decode images as the data loader does.

    torchvision's own decoder is compiled, and missing beside a CPU build of torch.
    """
    import torchvision.io

    def decode(image: torch.Tensor | str, *_: Any, **__: Any) -> torch.Tensor:
        """Return uint8 ``[3, height, width]`` of a file's name or its bytes, uint8 ``[bytes]``."""
        pixels = open_image(image if isinstance(image, str) else image.numpy().tobytes())
        return torch.from_numpy(np.array(pixels)).permute(2, 0, 1).contiguous()

    torchvision.io.decode_image = decode


def _server(model: Any, processor: Any, name: str) -> Any:
    """Return transformers' server, which knows this model alone, as uvicorn's Server."""
    import uvicorn
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.response import ResponseHandler
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.systemone import SystemOneHandler
    from transformers.cli.serving.transcription import TranscriptionHandler
    from transformers.cli.serving.utils import GenerationState

    class OneModel(ModelManager):
        """Knows the model that is loaded, and loads no other."""

        def load_model_and_processor(self, *_: Any, **__: Any) -> tuple[Any, Any]:
            return model, processor

        def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
            return [{"id": name, "object": "model", "created": 0, "owned_by": "vlmpo"}]

    manager = OneModel()
    manager.force_model = name  # a request for another model is refused
    state = GenerationState()
    both = {"model_manager": manager, "generation_state": state}
    app = build_server(
        manager,
        ChatCompletionHandler(**both),
        completion_handler=CompletionHandler(**both),
        response_handler=ResponseHandler(**both),
        transcription_handler=TranscriptionHandler(manager, state),
        systemone_handler=SystemOneHandler(**both),
        generation_state=state,
    )
    return uvicorn.Server(uvicorn.Config(app, log_level="warning"))
