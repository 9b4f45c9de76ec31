"""The control socket: QEMU's monitor protocol, for the commands of qemu-storage-daemon that make sense here."""
