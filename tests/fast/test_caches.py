import os
import subprocess
import sys
from pathlib import Path

import pytest

ASK = "from packvit.fast.caches import keep_kernels; import os; print(keep_kernels()); print({})"
NAMES = (
    "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED",
    "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR",
    "TRITON_CACHE_DIR",
)


def ask(environment: dict[str, str]) -> list[str]:
    """Return the folder of kernels, and what the libraries are told, in a process of its own."""
    told = f"[os.environ.get(name) for name in {NAMES}]"
    clean = {name: value for name, value in os.environ.items() if name not in NAMES}
    done = subprocess.run(
        [sys.executable, "-c", ASK.format(told)],
        env=clean | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def test_kernels_are_kept_in_packvits_cache_folder(tmp_path: Path):
    folder = tmp_path / "kernels"
    said, told = ask({"PACKVIT_CACHE": str(folder)})
    assert said == str(folder)
    assert told == str(["1", f"{folder}/flash_attention", f"{folder}/triton"])
    assert folder.stat().st_mode & 0o077 == 0  # what lies there is run: nobody else may write it
    said, _ = ask({"XDG_CACHE_HOME": str(tmp_path), "PACKVIT_CACHE": ""})
    assert said == str(tmp_path / "packvit")


def test_a_users_own_cache_folders_stay(tmp_path: Path):
    _, told = ask({"PACKVIT_CACHE": str(tmp_path), "TRITON_CACHE_DIR": "/elsewhere"})
    assert told == str(["1", f"{tmp_path}/flash_attention", "/elsewhere"])


def test_nothing_is_kept_where_the_folder_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    said, told = ask({"PACKVIT_CACHE": str(tmp_path / "file")})
    assert said == "None"
    assert told == str([None, None, None])


@pytest.mark.gpu
def test_warmup_leaves_kernels_that_a_second_process_finds(tmp_path: Path):
    def warm() -> set[Path]:
        command = [sys.executable, "-m", "packvit", "warmup", "tiny"]
        environment = {k: v for k, v in os.environ.items() if k not in NAMES}
        environment["PACKVIT_CACHE"] = str(tmp_path)
        subprocess.run(command, env=environment, check=True)
        return {path for path in tmp_path.rglob("*") if path.suffix in (".o", ".cubin")}

    first = warm()
    assert first
    assert warm() == first
