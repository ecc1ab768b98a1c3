"""Write the versions of the libraries that can change an output; all stages depend on it."""

from stages.params import Params
from stages.stage import TOOLCHAIN, new_output, run, versions, write_json


def main(params: Params) -> None:
    with new_output(TOOLCHAIN) as out:
        write_json(out, versions())


if __name__ == "__main__":
    run(main, "toolchain")
