"""A virtual machine with cgroup v2 in which this repository's tests of limits and jails run: `python -m tests.vm`.

Debian's kernel boots under qemu in seconds, emulated where /dev/kvm can't be used. The guest sees the host's /usr, a
copy of this checkout and the Python that started the command, all read-only, over 9p; whatever it writes lies on a
throw-away disk (ext4 with project quotas). It has no network. Nothing of the host's /etc (but links and caches), /home,
/root or /var is shared.

In the order of a run: `packages` (kernel and busybox from Debian's archive) → `initramfs` (first minutes of the guest)
→ `machine` (qemu, its deadlines, what it says) → `guest` (process 1 inside) → `outcomes` (pytest's results, from
inside) → `report`. Not part of the ordinary tests; tests/unit/test_vm.py covers what needs no qemu.
"""
