//! The `undermesh` binary: see the library for everything it does.

fn main() -> std::process::ExitCode {
    undermesh::cli::main()
}
