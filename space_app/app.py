"""What a Hugging Face Space runs. Change MODEL to a converted model on the Hub; None is the default one."""

import contextlib
import os
import threading
from pathlib import Path

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
with contextlib.suppress(ImportError):
    import spaces  # noqa: F401  (ZeroGPU wants to be there before torch is)

from msa_hf.packaged_model import ready_model  # noqa: E402
from msa_hf.space_app.gpu import lends  # noqa: E402
from msa_hf.space_app.server import served  # noqa: E402
from msa_hf.space_app.space import Space  # noqa: E402

MODEL: str | None = None
PERSISTENT = Path("/data")  # a Space's own disk, where it has one
HOST, PORT = "0.0.0.0", 7860


def main() -> None:
    state = PERSISTENT / "msa-space" if os.access(PERSISTENT, os.W_OK) else None
    model, tokenizer, name = ready_model(MODEL, device="cpu" if lends() else None)
    with served(Space(model, tokenizer, name, state), HOST, PORT):
        threading.Event().wait()


if __name__ == "__main__":
    main()
