"""The QEMU Pi: packages, image, machine, qtest, snapshots."""
