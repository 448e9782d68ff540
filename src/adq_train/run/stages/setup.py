"""What a run begins with, as its manifest notes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adq_train.reporting.report import num_float_values
from adq_train.run.folder import input_files
from adq_train.run.session import Session
from adq_train.storage.files import sha256


def facts(session: Session, command: list[str]) -> dict[str, Any]:
    """Command, device, data, files and model of a run.

    Args:
        session: The run's.
        command: What repeats it.
    """
    config, data, trainer = session.config, session.data, session.config.trainer
    checkpoint = config.pretrain.checkpoint
    files = {name: sha256(path) for name, path in input_files(config.plain()).items()}
    begun = {"init_from": config.init_from_sha256} if session.start else {}
    return {
        "command": command,
        "seed": config.seed,
        "device": str(session.parts.device),
        "processes": session.ranks.world_size,
        "compile": trainer.compile,
        "channels_last": trainer.channels_last,
        "data": {"name": data.name, "fingerprint": data.fingerprint},
        "checkpoint_sha256": sha256(Path(checkpoint)) if checkpoint else None,
        "files": files | begun,
        "input": data.input_format.to_dict(),
        "model": {
            "num_float_values": num_float_values(session.model, session.problem.layers),
            "num_edges": session.parts.target.num_edges(session.model),
            "target": session.parts.target.name,
        },
    }
