//! Shown: while one process has a store open, another one can look at it and is refused to change
//! it. How: this binary runs itself as the writer, which says when it is ready and ends when its
//! standard input does; the real `stemkv` binary is run beside it.

mod support;

use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Output, Stdio};

use stemkv_store::DiskTier as _;
use support::Home;

const STORE: &str = "STEMKV_TEST_STORE";

/// The writer, where it is asked to be one.
#[test]
fn writer() {
    let Some(dir) = std::env::var_os(STORE) else {
        return;
    };
    let geometry = support::engine::geometry();
    let clock = std::sync::Arc::new(stemkv_store::SystemClock::default());
    let disk = stemkv_store::disk::RocksDisk::open(dir.as_ref(), &geometry, 64 << 20, clock)
        .expect("free");
    // Into the log alone: a reader must see that too.
    disk.put_meta(&stemkv_store::Key([7; 32]), b"not a description")
        .expect("writable");
    println!("\nready");
    std::io::stdin()
        .read_to_end(&mut Vec::new())
        .expect("a pipe");
}

fn stemkv(home: &Home, command: &str, options: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_stemkv"))
        .arg(command)
        .arg(home.path())
        .args(options)
        .output()
        .expect("the binary was built")
}

#[tokio::test]
async fn a_store_is_shown_beside_its_writer_and_not_compacted() {
    let home = Home::new().await;
    let mut writer = Command::new(std::env::current_exe().expect("this test"))
        .args(["--exact", "writer", "--nocapture"])
        .env(STORE, home.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("this test can be run");
    // Kept open: the writer has more to say when it ends.
    let mut said = BufReader::new(writer.stdout.take().expect("piped")).lines();
    assert!(said.any(|line| line.expect("text") == "ready"));
    let pid = writer.id();

    for (command, field) in [
        ("inspect", "records"),
        ("verify", "sound"),
        ("stats", "records"),
    ] {
        let ran = stemkv(&home, command, &["--json"]);
        assert_eq!(ran.status.code(), Some(0), "{ran:?}");
        let json: serde_json::Value = serde_json::from_slice(&ran.stdout).expect("JSON");
        assert_eq!(json[field], 10);
        assert_eq!(
            json["access"],
            serde_json::json!({ "how": "beside_writer", "pid": pid })
        );
    }
    for options in [&["--yes"][..], &[]] {
        let refused = stemkv(&home, "compact", options);
        assert_eq!(refused.status.code(), Some(3), "{refused:?}");
        let said = String::from_utf8(refused.stderr).expect("text");
        assert!(
            said.contains(&format!("pid={pid}, program=beside_writer")),
            "{said}"
        );
    }

    drop(writer.stdin.take());
    assert!(writer.wait().expect("it ends").success());
    assert_eq!(stemkv(&home, "compact", &["--yes"]).status.code(), Some(0));
}
