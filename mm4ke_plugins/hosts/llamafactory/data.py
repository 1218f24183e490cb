"""The facts as LLaMA-Factory reads them: through the cache of the datasets library."""

import os
import tempfile
from pathlib import Path

from datasets import DownloadMode, load_dataset
from llamafactory.data.parser import get_dataset_list
from llamafactory.extras.constants import FILEEXT2TYPE


def renew_cached_facts(model_args, data_args) -> None:
    """See to it that what the cache has for the recipe's files is what is in them.

    The cache knows a file by its path and its time only. So facts that were copied or unpacked with the time of
    earlier ones at the same place would not be trained, but the earlier ones again.
    """
    for dataset in get_dataset_list(data_args.dataset, data_args.dataset_dir):
        if dataset.load_from != "file":
            continue
        place = os.path.join(data_args.dataset_dir, dataset.dataset_name)
        files = [os.path.join(place, name) for name in os.listdir(place)] if os.path.isdir(place) else [place]
        kind = FILEEXT2TYPE.get(Path(files[0]).suffix[1:]) if files else None
        if kind is None or not all(map(os.path.isfile, files)):
            continue  # LLaMA-Factory says so
        arguments = {"path": kind, "data_files": files, "split": dataset.split}
        cached = load_dataset(**arguments, cache_dir=model_args.cache_dir)
        with tempfile.TemporaryDirectory() as aside:
            is_current = load_dataset(**arguments, cache_dir=aside).data.table.equals(cached.data.table)
        if not is_current:
            load_dataset(**arguments, cache_dir=model_args.cache_dir, download_mode=DownloadMode.FORCE_REDOWNLOAD)
