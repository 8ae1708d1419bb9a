"""Frames of any data set. Which one lies in a folder is seen by what is in it, so that no flag has to say it:

    nuScenes            a folder of tables, v1.0-trainval or another version
    KITTI's odometry    sequences/
    Waymo, converted    conversion.json, which data_waymo.py writes, in KITTI's object layout
    KITTI's object      training/ or testing/
    KITTI raw           else

A split is what the data set calls so: docs/data.md has a table.
"""

from pathlib import Path

import data_kitti
import data_nuscenes
from files import BadInput


def is_nuscenes(root):
    return any(path.is_dir() for path in Path(root).glob("v[0-9]*.[0-9]*"))


def name_of(root):
    """What lies in a folder, in words."""
    if is_nuscenes(root):
        return "nuScenes"
    if data_kitti.sequences_of(root):
        return "KITTI odometry"
    if data_kitti.is_object_layout(root):
        return "Waymo, converted" if (Path(root) / "conversion.json").is_file() else "KITTI object"
    return "KITTI raw"


def refuse_waymo(roots):
    """Raises BadInput for a folder of Waymo's, which is in KITTI's layout, but labels other classes."""
    for root in roots:
        if name_of(root) == "Waymo, converted":
            raise BadInput(f"{root}: Waymo, converted; its labels are not of KITTI's classes")


def all_nuscenes(roots):
    """Whether the folders are nuScenes'. Raises BadInput where some are and others are not: splits of one name would be
    different things.
    """
    ours = [root for root in roots if is_nuscenes(root)]
    others = [root for root in roots if root not in ours]
    if ours and others:
        raise BadInput(f"{ours[0]} and {others[0]}: nuScenes is not pooled with other data sets")
    return bool(ours)


def pool_frames(
    roots,
    splits=None,
    cameras=data_nuscenes.CAMERAS,
    version="auto",
    frame_stride=1,
    skip_missing=False,
    flag="--splits",
    named=True,
    limit=0,
    clouds=True,
):
    """Frames of several folders, none of them twice. -> data.Frames, notes to print.

    cameras, version: of nuScenes alone. clouds=False: images are enough. All else, and what is raised, as
    data_kitti.pool_frames and data_nuscenes.pool_frames have it.
    """
    if all_nuscenes(roots):
        rules = cameras, version, frame_stride, skip_missing, flag, limit, clouds
        return data_nuscenes.pool_frames(roots, splits or (), *rules)
    return data_kitti.pool_frames(roots, splits, frame_stride, skip_missing, flag, named, limit, clouds)
