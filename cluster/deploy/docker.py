"""The image of all nodes: this program in its pinned environment."""

from __future__ import annotations

from collections.abc import Sequence

PYTHON = "3.11"
PACKAGES = ("g++", "make", "wget", "openssh-client", "rsync")
"""g++ builds DeepSpeed's operator on CPUs; KubeRay's probes call wget; the cluster launcher needs the last two."""
FOLDERS = ("orchestrator", "jobs", "strategies", "cluster")
USER_ID = 1000


def dockerfile(environment: dict[str, str], folders: Sequence[str] = FOLDERS) -> str:
    """Built from the root of this repository: `docker build -t IMAGE -f Dockerfile .`. Copies what it names, so nothing else of the
    working tree gets into the image."""
    variables = "".join(f"ENV {name}={_quoted(value)}\n" for name, value in environment.items())
    copies = "".join(f"COPY {folder} ./{folder}\n" for folder in folders)
    return f"""FROM python:{PYTHON}-slim
RUN apt-get update && apt-get install -y --no-install-recommends {" ".join(PACKAGES)} && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid {USER_ID} ray && mkdir /work && chown ray /work
WORKDIR /work
COPY requirements.txt ./
RUN pip install --no-cache-dir -r requirements.txt
COPY pyproject.toml README.md LICENSE ray_config.yaml ./
{copies}RUN pip install --no-cache-dir --no-deps -e .
{variables}ENV RAY_AUTH_MODE=token
USER ray
"""


def _quoted(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("$", "\\$")
    return f'"{escaped}"'
