# What a machine has set up once it is booted; then the command, and its exit code to the second serial port.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
kit=/run/undermesh-vm
echo "$kit/modprobe" >/proc/sys/kernel/modprobe
mkdir -p /dev/pts /dev/shm && ln -s /proc/self/fd /dev/fd
mount -t devpts devpts /dev/pts
mount -t tmpfs shm /dev/shm
chmod 1777 /dev/shm
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
ip link set lo up
hostname undermesh-vm
ulimit -Hn 1048576 && ulimit -Sn 1024

"$kit/busybox" sh "$kit/command.sh"
echo $? >/dev/ttyS1
# Waits until all that was printed has left the machine: stty sets modes once the line is drained.
"$kit/busybox" stty -echo </dev/console
"$kit/busybox" poweroff -f
