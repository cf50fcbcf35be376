"""Convert a model between a directory of safetensors and a file of tensorizer's.

    python scripts/convert_tensors.py MODEL.tensors DIRECTORY     (config.json beside the file)
    python scripts/convert_tensors.py DIRECTORY MODEL.tensors

Commands that take `--model-dir MODEL.tensors` convert by themselves, into a cache.
"""

from pathlib import Path

from command_line import Parser, run_main

from pipeline.planning.tensorized import from_tensors, is_tensorized, to_tensors


def main() -> None:
    parser = Parser(prog="convert_tensors", description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    options = parser.parse_args()
    convert = from_tensors if is_tensorized(options.source) else to_tensors
    if is_tensorized(options.source) == is_tensorized(options.target):
        parser.error("one of the two is a .tensors file, the other a directory")
    convert(options.source, options.target)


if __name__ == "__main__":
    run_main("convert_tensors", main)
