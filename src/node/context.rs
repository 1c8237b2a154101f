//! Who this node is: its task id on ECS, and the context that is stored upstream with a replica
//! (spec: operations §1.3).

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{Read as _, Write as _};
use std::net::{TcpStream, ToSocketAddrs, UdpSocket};
use std::time::Duration;

use serde_json::{Map, Value};

/// Environment variable with the address of the container's metadata; its presence means ECS.
pub const ECS_METADATA: &str = "ECS_CONTAINER_METADATA_URI_V4";
/// Longest wait for the metadata. It is served from the same host.
const METADATA_TIMEOUT: Duration = Duration::from_secs(2);
/// Largest metadata document.
const METADATA_BYTES: u64 = 256 * 1024;

/// (key of the context, variables of platforms; the first that is set counts).
const PLATFORM: [(&str, &[&str]); 13] = [
    ("flyAppName", &["FLY_APP_NAME"]),
    ("flyMachineID", &["FLY_MACHINE_ID"]),
    ("railwayProjectID", &["RAILWAY_PROJECT_ID"]),
    ("railwayProjectName", &["RAILWAY_PROJECT_NAME"]),
    ("railwayEnvironmentID", &["RAILWAY_ENVIRONMENT_ID"]),
    ("railwayEnvironmentName", &["RAILWAY_ENVIRONMENT_NAME"]),
    ("railwayServiceID", &["RAILWAY_SERVICE_ID"]),
    ("railwayServiceName", &["RAILWAY_SERVICE_NAME"]),
    ("railwayDeploymentID", &["RAILWAY_DEPLOYMENT_ID"]),
    ("gcpProject", &["GOOGLE_CLOUD_PROJECT", "GCP_PROJECT", "GCLOUD_PROJECT"]),
    ("coolifyDomainName", &["COOLIFY_FQDN"]),
    ("coolifyContainerName", &["COOLIFY_CONTAINER_NAME"]),
    ("azureEnvName", &["AZURE_ENV_NAME"]),
];

/// The context of this node.
pub fn server_context(
    app_id: &str,
    task_id: &str,
    timestamp: &str,
    env: &BTreeMap<String, String>,
) -> Value {
    let mut context = Map::new();
    let hostname = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    for (key, value) in [
        ("appID", app_id),
        ("taskID", task_id),
        ("hostIP", &host_ip()),
        ("hostname", hostname.trim()),
        ("timestamp", timestamp),
    ] {
        context.insert(key.to_owned(), value.into());
    }
    for (key, names) in PLATFORM {
        if let Some(value) = names.iter().find_map(|name| env.get(*name)) {
            context.insert(key.to_owned(), value.as_str().into());
        }
    }
    Value::Object(context)
}

/// The address that packets to elsewhere leave from; the loopback address without a route.
/// Connecting a UDP socket sends nothing.
pub fn host_ip() -> String {
    let outward = |bind: &str, to: &str| {
        let socket = UdpSocket::bind(bind).ok()?;
        socket.connect(to).ok()?;
        let ip = socket.local_addr().ok()?.ip();
        (!ip.is_unspecified()).then_some(ip)
    };
    // Addresses that are reserved for documentation.
    match outward("0.0.0.0:0", "203.0.113.1:9").or_else(|| outward("[::]:0", "[2001:db8::1]:9")) {
        Some(std::net::IpAddr::V6(ip)) => format!("[{ip}]"),
        Some(ip) => ip.to_string(),
        None => "127.0.0.1".to_owned(),
    }
}

/// The task's id from the metadata: the last part of its `TaskARN`.
///
/// # Errors
/// What went wrong; the caller falls back to a random id.
pub fn ecs_task_id(metadata_uri: &str) -> Result<String, String> {
    let body = get(&format!("{}/task", metadata_uri.trim_end_matches('/')))?;
    let task: Value = serde_json::from_slice(&body).map_err(|e| e.to_string())?;
    let arn = task.get("TaskARN").and_then(Value::as_str).ok_or("no TaskARN in the metadata")?;
    Ok(arn.rsplit('/').next().unwrap_or(arn).to_owned())
}

/// GET over plain HTTP/1.0: the metadata service offers nothing else.
fn get(url: &str) -> Result<Vec<u8>, String> {
    let failed = |e: std::io::Error| format!("GET {url}: {e}");
    let rest = url.strip_prefix("http://").ok_or(format!("{url} is no http:// URL"))?;
    let (authority, path) = rest.split_once('/').map_or((rest, ""), |(a, p)| (a, p));
    let with_port =
        if authority.contains(':') { authority.to_owned() } else { format!("{authority}:80") };
    let address = with_port.to_socket_addrs().map_err(failed)?.next().ok_or("no address")?;
    let mut stream = TcpStream::connect_timeout(&address, METADATA_TIMEOUT).map_err(failed)?;
    stream.set_read_timeout(Some(METADATA_TIMEOUT)).map_err(failed)?;
    let mut request = String::new();
    let _ = write!(request, "GET /{path} HTTP/1.0\r\nHost: {authority}\r\n\r\n");
    stream.write_all(request.as_bytes()).map_err(failed)?;
    let mut answer = Vec::new();
    stream.take(METADATA_BYTES).read_to_end(&mut answer).map_err(failed)?;
    let split = answer.windows(4).position(|w| w == b"\r\n\r\n").ok_or("no HTTP response")?;
    let status = String::from_utf8_lossy(&answer[..split]);
    let status = status.lines().next().unwrap_or_default();
    if status.split(' ').nth(1) != Some("200") {
        return Err(format!("GET {url}: {status}"));
    }
    Ok(answer.split_off(split + 4))
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead as _, BufReader};
    use std::net::TcpListener;

    use super::*;

    /// A metadata service that answers one request; returns its address and what was asked.
    fn stub(status: &'static str, body: &'static str) -> (String, std::thread::JoinHandle<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let uri = format!("http://{}/v4/abc", listener.local_addr().unwrap());
        let served = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
            let first = lines.next().unwrap().unwrap();
            while lines.next().is_some_and(|line| !line.unwrap().is_empty()) {}
            write!(stream, "HTTP/1.1 {status}\r\nConnection: close\r\n\r\n{body}").unwrap();
            first
        });
        (uri, served)
    }

    #[test]
    fn the_task_id_is_the_end_of_the_arn() {
        let body = r#"{"TaskARN":"arn:aws:ecs:us-east-1:1:task/cluster/0123abc","Other":1}"#;
        let (uri, served) = stub("200 OK", body);
        assert_eq!(ecs_task_id(&uri).as_deref(), Ok("0123abc"));
        assert_eq!(served.join().unwrap(), "GET /v4/abc/task HTTP/1.0");
    }

    #[test]
    fn failures_say_what_happened() {
        let (uri, _served) = stub("503 Busy", "");
        assert!(ecs_task_id(&uri).unwrap_err().contains("503 Busy"));
        let (uri, _served) = stub("200 OK", "{}");
        assert!(ecs_task_id(&uri).unwrap_err().contains("TaskARN"));
        assert!(ecs_task_id("https://x").unwrap_err().contains("http://"));
    }

    #[test]
    fn the_context_has_the_originals_keys() {
        let env = BTreeMap::from([
            ("FLY_APP_NAME".to_owned(), "app".to_owned()),
            ("GCP_PROJECT".to_owned(), "p".to_owned()),
        ]);
        let context = server_context("zero", "t", "now", &env);
        let keys: Vec<&str> = context.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(
            keys,
            ["appID", "taskID", "hostIP", "hostname", "timestamp", "flyAppName", "gcpProject"]
        );
        assert!(!context["hostIP"].as_str().unwrap().is_empty());
    }
}
