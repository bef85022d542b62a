//! Expressions of policies, and what they make of a request: the first line is the expression, the second the path, the third the host,
//! the fourth a header, the rest the claims.

#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use undermesh::model::SpiffeId;
use undermesh::policy::authorization::{
    Action, Applied, Condition, Connection, Expression, Policy, Request, Rule, Set,
};

fuzz_target!(|input: &str| {
    let mut lines = input.splitn(5, '\n');
    let mut next = || lines.next().unwrap_or_default();
    let (text, path, host, header, claims) = (next(), next(), next(), next(), next());
    let Ok(expression) = Expression::parse(text) else { return };
    let condition = Condition::Cel(expression);
    let policy = |action, name: &str| {
        let rule = Rule { when: vec![condition.clone()], ..Rule::default() };
        let policy = Policy { name: name.into(), action, dry_run: false, rules: vec![rule], invalid: None };
        Applied { policy: Arc::new(policy), ports: None }
    };
    let mut headers = http::HeaderMap::new();
    if let Ok(value) = http::HeaderValue::from_str(header) {
        headers.insert("x", value);
    }
    let claims: Option<serde_json::Map<_, _>> = serde_json::from_str(claims).ok();
    let identity: Option<SpiffeId> = "spiffe://cluster.local/ns/shop/sa/web".parse().ok();
    let connection = Connection { identity: identity.as_ref(), address: [10, 0, 0, 1].into(), port: 80 };
    let request = Request {
        method: &http::Method::GET,
        path,
        host: Some(host),
        headers: &headers,
        claims: claims.as_ref(),
        is_grpc: false,
        ignores_path_case: false,
    };
    let allows = Set::new(vec![policy(Action::Allow, "a")]).request(&connection, &request);
    let both = Set::new(vec![policy(Action::Allow, "a"), policy(Action::Deny, "d")]);
    assert!(!both.request(&connection, &request).is_allowed(), "true denies, and what fails does");
    assert!(!both.bytes(&connection).is_allowed());
    if allows.is_allowed() {
        let denies = Set::new(vec![policy(Action::Deny, "d")]).request(&connection, &request);
        assert!(!denies.is_allowed(), "what is true is true again");
    }
});
