#!/bin/busybox sh
# The VM's first program. It makes this machine's files, read-only and under a layer of memory, the root of the VM, and
# goes on there. /settings says where the modules are (MODULES, a path of this machine).
/bin/busybox mkdir -p /proc /sys /dev /below /above /root /sbin
/bin/busybox --install -s /bin
export PATH=/bin
. /settings
mount -t proc proc /proc && mount -t sysfs sysfs /sys && mount -t devtmpfs devtmpfs /dev
echo "==> Linux $(uname -r) is up after $(cut -d' ' -f1 /proc/uptime) s"

# Some kernels have them built in, which modprobe does not know.
for module in virtio_pci virtiofs overlay; do modprobe "$module" 2>/dev/null; done
mount -t virtiofs -o ro host /below &&
    mount -t tmpfs -o size=50% above /above &&
    mkdir /above/files /above/work &&
    mount -t overlay -o lowerdir=/below,upperdir=/above/files,workdir=/above/work root /root ||
    { echo "this machine's files are not to be seen in the VM"; poweroff -f; }

mount -t tmpfs run /root/run
kit=/root/run/undermesh-vm
mkdir "$kit" && cp /bin/busybox /main.sh /command.sh "$kit"
# The kernel calls this one when it wants a module; the machine may have none.
ln -s busybox "$kit/modprobe"
modules=/lib/modules/$(uname -r)
mkdir -p "/root$modules" && mount --bind "/below$MODULES" "/root$modules"
for mount in proc sys dev; do mount --move "/$mount" "/root/$mount"; done
exec switch_root /root /run/undermesh-vm/busybox sh /run/undermesh-vm/main.sh
