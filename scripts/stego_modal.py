"""Hide a message with the deployed Modal app, and read it again from the text.

    .venv/bin/python scripts/stego_modal.py -m MESSAGE -p PROMPT [--full] [--model NAME] [--gpu KIND]

It takes an account of Modal's and a deployed app: pipeline/stego/adapters/README.md.
"""

import argparse
import sys
import time

try:
    import modal
    from modal.exception import AuthError, NotFoundError
except ImportError:
    sys.exit("modal is not installed; run scripts/setup.sh modal")

from pipeline.errors import PipelineError
from pipeline.stego.adapters.modal_app import APP_NAME, CLASS_NAME

NUM_SHOWN = 80


def arguments(argv):
    parser = argparse.ArgumentParser(description="One round trip through the deployed Modal app.")
    parser.add_argument("-m", "--message", required=True)
    parser.add_argument("-p", "--prompt", required=True)
    parser.add_argument("--full", action="store_true", help="show the whole text, and the time")
    parser.add_argument("--model", help="another than the app was deployed with")
    parser.add_argument("--gpu", help="another than the app was deployed with")
    return parser.parse_args(argv)


def deployed(given):
    """The app's class, for a model and a GPU."""
    kind = modal.Cls.from_name(APP_NAME, CLASS_NAME)
    kind.hydrate()  # asks whether it is there
    if given.gpu:
        kind = kind.with_options(gpu=given.gpu)
    return kind(model=given.model) if given.model else kind()


def main(argv=None):
    given = arguments(argv)
    try:
        stego = deployed(given)
        start = time.perf_counter()
        text = stego.encode.remote(given.message, given.prompt)
        encoded = time.perf_counter()
        message = stego.decode.remote(text, given.prompt)
        decoded = time.perf_counter()
    except NotFoundError:
        return "Model not deployed: run modal deploy -m pipeline.stego.adapters.modal_app"
    except AuthError:
        return "Modal does not know you: run modal setup"
    except PipelineError as error:
        return f"error: {error}"
    print(text if given.full or len(text) <= NUM_SHOWN else f"{text[:NUM_SHOWN]}…")
    if given.full:
        times = f"encoded in {encoded - start:.1f} s, decoded in {decoded - encoded:.1f} s"
        print(f"{len(text)} characters, {times}", file=sys.stderr)
    if message != given.message.encode():
        return "error: another message was read than was hidden"
    print("the message was read from the text", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
