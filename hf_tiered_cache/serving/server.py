"""The parts of the server put together: `Server`, and `run`, which serves until it is ended."""

import inspect
import os
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerationState

from hf_tiered_cache.errors import UnsupportedInputError
from hf_tiered_cache.integration.cache import TieredCache
from hf_tiered_cache.serving.admission import INTERNAL_ERROR, Admission, Limits
from hf_tiered_cache.serving.conversations import Conversations
from hf_tiered_cache.serving.generation import TieredGenerateManager
from hf_tiered_cache.serving.handlers import ChatHandler, ResponsesHandler, TextHandler
from hf_tiered_cache.serving.instruments import Instruments
from hf_tiered_cache.serving.requests import Requests
from hf_tiered_cache.serving.turns import TurnThread
from hf_tiered_cache.serving.utilisation import ModelFlops, probe_flops
from hf_tiered_cache.sizes import AUTO
from hf_tiered_cache.store.block_store import BlockStore

GRACE_SECONDS = 10  # for answers under way when the server is told to end


@dataclass(frozen=True)
class Settings:
    """How a model is served. Times in seconds, sizes in bytes, or as `TieredCache` takes them."""

    model: str
    device: str = "auto"
    dtype: str = "auto"
    attention: str | None = None
    cache: dict[str, Any] = field(default_factory=dict)  # arguments of the shared TieredCache
    store: str | os.PathLike[str] | None = None  # folder of blocks that outlive the server
    store_bytes: int | str = AUTO
    chunk: int = 512  # prompt tokens per forward
    max_num_seqs: int = 4  # interleaved
    max_num_parked: int = 64
    max_num_queued_reqs: int = 64
    max_num_queued_tokens: int = 200_000
    limits: Limits = field(default_factory=Limits)
    keys: tuple[str, ...] = ()


class OneModel(ModelManager):
    """transformers' manager of models, which says that there is this one."""

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        """The model that is served, as OpenAI lists models."""
        return [{"id": self.force_model, "object": "model", "created": 0, "owned_by": "local"}]


class State(GenerationState):
    """transformers' state of generation, with our manager for every model."""

    def __init__(self, manager: TieredGenerateManager) -> None:
        super().__init__()
        self._manager = manager

    def get_manager(self, model_id: str, use_cb: bool = False) -> TieredGenerateManager:
        """The one there is."""
        return self._manager


class Server:
    """A loaded model behind an ASGI app. Close it to give its memory, files and threads back."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        models = OneModel(device=settings.device, dtype=settings.dtype, force_model=settings.model)
        (loaded,) = models.loaded_models.values()
        self.model = loaded.model
        _refuse_shared_positions(self.model)
        if settings.attention is not None:
            self.model.set_attn_implementation(settings.attention)
        self.instruments = Instruments()
        store = None
        if settings.store is not None:
            store = BlockStore(settings.store, capacity_bytes=settings.store_bytes)
        root = TieredCache(self.model.config, store=store, **settings.cache)
        self.conversations = Conversations(root, settings.max_num_parked)
        self.instruments.parked.set_function(lambda: len(self.conversations))
        self.instruments.peak_flops.set(probe_flops(self.model))
        self.thread = TurnThread(settings.max_num_seqs)
        manager = TieredGenerateManager(
            self.thread,
            self.conversations,
            self.instruments,
            ModelFlops(self.model),
            settings.chunk,
        )
        state = State(manager)
        ours = {
            "model_manager": models,
            "chat_handler": ChatHandler(models, state),
            "completion_handler": TextHandler(models, state),
            "response_handler": ResponsesHandler(models, state),
            "generation_state": state,
        }
        # What else a version has (speech, decisions) has endpoints that `Admission` does not pass.
        none = dict.fromkeys(set(inspect.signature(build_server).parameters) - {"enable_cors"})
        app = build_server(**{**none, **ours})
        app.add_exception_handler(HTTPException, _as_openai)
        app.add_exception_handler(RequestValidationError, _as_openai)
        app.add_exception_handler(Exception, _as_openai)
        self.requests = Requests(
            settings.max_num_seqs, settings.max_num_queued_reqs, settings.max_num_queued_tokens
        )
        self.app = Admission(
            app,
            self.requests,
            self.instruments,
            settings.limits,
            settings.keys,
            lambda: self.thread.is_alive,
        )

    def close(self) -> None:
        """End what runs, and the cache. Idempotent."""
        self.thread.stop()
        self.conversations.close()


def _refuse_shared_positions(model: Any) -> None:
    """Qwen2-VL and its relatives keep an offset of positions in a module, from the last request
    with a picture, and shift whatever request comes next by it."""
    for name, module in model.named_modules():
        kind = type(module).__name__
        if hasattr(module, "rope_deltas"):
            raise UnsupportedInputError(
                f"{type(model).__name__} cannot be served: {name or 'it'} ({kind}) "
                "keeps rope_deltas, the positions of one request, which would shift those of the "
                "next and spoil the blocks they share; expected a model without it, such as the "
                "text model of the same family"
            )


async def _as_openai(request: Any, error: Exception) -> JSONResponse:
    """An error as OpenAI clients show it; FastAPI's own form is a bare "Error code" to them."""
    kind = "invalid_request_error"
    if isinstance(error, HTTPException):
        status, text = error.status_code, str(error.detail)
    elif isinstance(error, RequestValidationError):
        parts = [f"{'.'.join(map(str, it['loc']))}: {it['msg']}" for it in error.errors()]
        status, text = 422, "; ".join(parts)
    else:
        status, text, kind = 500, INTERNAL_ERROR, "server_error"
    said = {"message": text, "type": kind, "code": status}
    return JSONResponse({"error": said}, status_code=status)


def run(server: Server, host: str, port: int) -> None:
    """Serve until interrupted; closes the server."""
    try:
        uvicorn.run(
            server.app,
            host=host,
            port=port,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=GRACE_SECONDS,
        )
    finally:
        server.close()
