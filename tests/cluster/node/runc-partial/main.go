// Program runc-partial is runc for a machine that cannot give containers everything. Its cgroup2 tree may lack controllers,
// because the machine has given them to cgroup v1, and not even root may have CAP_SYS_RESOURCE. What is missing is left
// out before runc sees it, for it would fail. It knows nothing of Kubernetes; where all is there it changes nothing.
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

// The parts of `linux.resources` in a bundle's config.json, and the controller that each needs. Devices need none:
// in cgroup2 they are a BPF program.
var controllers = map[string]string{
	"blockIO":        "io",
	"cpu":            "cpu",
	"hugepageLimits": "hugetlb",
	"memory":         "memory",
	"pids":           "pids",
	"rdma":           "rdma",
	// Raw files of any controller; there are too many of them to tell which would be there.
	"unified": "memory",
}

func main() {
	own, err := os.Executable()
	if err != nil {
		fail(err)
	}
	runc := filepath.Join(filepath.Dir(own), "runc")
	there, err := os.ReadFile("/sys/fs/cgroup/cgroup.controllers")
	if err != nil {
		fail(err)
	}
	available := strings.Fields(string(there))
	arguments := os.Args[1:]
	switch subcommand(arguments) {
	case "create", "run":
		// runc's default is the current folder.
		bundle := option(arguments, "--bundle", "-b", ".")
		err = edit(filepath.Join(bundle, "config.json"), func(spec object) {
			resources := part(part(spec, "linux"), "resources")
			for name, controller := range controllers {
				if !slices.Contains(available, controller) {
					delete(resources, name)
				}
			}
			leaveOutPrivileges(part(spec, "process"))
		})
	case "exec":
		if file := option(arguments, "--process", "-p", ""); file != "" {
			err = edit(file, leaveOutPrivileges)
		}
	case "update":
		// What can be updated are limits; one of those whose controllers are missing cannot be set later either.
		if !slices.Contains(available, "cpu") || !slices.Contains(available, "memory") {
			return
		}
	}
	if err != nil {
		fail(err)
	}
	fail(syscall.Exec(runc, append([]string{runc}, os.Args[1:]...), os.Environ()))
}

// The first word that is neither an option nor the value of one: runc's global options that take a value.
func subcommand(args []string) string {
	for i := 0; i < len(args); i++ {
		switch args[i] {
		case "--root", "--log", "--log-format", "--rootless":
			i++
		default:
			if !strings.HasPrefix(args[i], "-") {
				return args[i]
			}
		}
	}
	return ""
}

// The value of an option.
func option(args []string, long, short, otherwise string) string {
	for i, arg := range args {
		if (arg == long || arg == short) && i+1 < len(args) {
			return args[i+1]
		}
		if value, found := strings.CutPrefix(arg, long+"="); found {
			return value
		}
	}
	return otherwise
}

// Takes CAP_SYS_RESOURCE out of what a process is to have, and what needs it: a score below one's own. containerd gives nobody
// what it has not itself; CRI-O gives privileged containers all that the kernel knows.
func leaveOutPrivileges(process object) {
	if hasSysResource() {
		return
	}
	sets := part(process, "capabilities")
	for kind, set := range sets {
		names, _ := set.([]any)
		sets[kind] = slices.DeleteFunc(names, func(name any) bool { return name == "CAP_SYS_RESOURCE" })
	}
	if score, _ := process["oomScoreAdj"].(json.Number); strings.HasPrefix(string(score), "-") {
		delete(process, "oomScoreAdj")
	}
}

// Whether it is in the set that bounds all others.
func hasSysResource() bool {
	const sysResource = 24
	status, _ := os.ReadFile("/proc/self/status")
	for line := range strings.Lines(string(status)) {
		if set, found := strings.CutPrefix(line, "CapBnd:"); found {
			bits, err := strconv.ParseUint(strings.TrimSpace(set), 16, 64)
			return err != nil || bits&(1<<sysResource) != 0
		}
	}
	return true
}

type object = map[string]any

// A part that is an object; what is read of one that is missing is empty.
func part(of object, name string) object {
	found, _ := of[name].(object)
	return found
}

func edit(file string, change func(object)) error {
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	// Numbers stay as they are written: a limit may be larger than a float can tell exactly.
	var content object
	decoder := json.NewDecoder(bytes.NewReader(text))
	decoder.UseNumber()
	if err := decoder.Decode(&content); err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	change(content)
	if text, err = json.Marshal(content); err != nil {
		return err
	}
	return os.WriteFile(file, text, 0o600)
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "runc-partial:", err)
	os.Exit(1)
}
