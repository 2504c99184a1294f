package kmstest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"reflect"
	"regexp"
	"slices"
	"strings"

	"github.com/aws/aws-sdk-go-v2/service/kms"
)

// PolicyKind is where a policy is attached.
type PolicyKind string

// The kinds.
const (
	RolePolicy     PolicyKind = "role"     // identity based
	KeyPolicy      PolicyKind = "key"      // of a KMS key
	EndpointPolicy PolicyKind = "endpoint" // of a VPC endpoint
	ControlPolicy  PolicyKind = "control"  // of an organization; here it only denies
)

// What AWS takes of each kind: characters without white space for a managed policy and a control policy, bytes for the others.
// https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_iam-quotas.html
// https://docs.aws.amazon.com/kms/latest/developerguide/resource-limits.html
// https://docs.aws.amazon.com/vpc/latest/privatelink/vpc-endpoints-access.html
// https://docs.aws.amazon.com/organizations/latest/userguide/orgs_reference_limits.html
var policySize = map[PolicyKind]int{RolePolicy: 6144, KeyPolicy: 32 << 10, EndpointPolicy: 20480, ControlPolicy: 5120}

// Policy is a policy document that [ParsePolicy] has found no fault with.
type Policy struct {
	Statements []Statement
}

// Statement is one statement of a policy. Of the grammar, NotPrincipal, NotAction and NotResource are left out, and principals that are services: none of ours has a use for them.
type Statement struct {
	Sid       string
	Deny      bool
	Principal []string // ARNs, or "*"; nil where it is whoever the policy is attached to
	Action    []string
	Resource  []string
	Condition map[string]map[string][]string // operator -> key -> values
}

// PolicyActions are the actions of KMS that a policy can name: the operations that the SDK has, but that ReEncrypt needs two permissions.
// https://docs.aws.amazon.com/service-authorization/latest/reference/list_awskeymanagementservice.html
func PolicyActions() []string {
	client := reflect.TypeFor[*kms.Client]()
	actions := []string{"kms:ReEncryptFrom", "kms:ReEncryptTo"}
	for i := range client.NumMethod() {
		if name := client.Method(i).Name; name != "Options" && name != "ReEncrypt" {
			actions = append(actions, "kms:"+name)
		}
	}
	return actions
}

// foreignActions are those of other services that our policies name.
var foreignActions = []string{"elasticmapreduce:DescribeCluster", "elasticmapreduce:DescribeSecurityConfiguration", "s3:GetObject", "s3:ListBucket", "s3:PutObject"}

// conditionKeys are those that our policies may use.
// https://docs.aws.amazon.com/kms/latest/developerguide/conditions-kms.html
// https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_policies_condition-keys.html
var conditionKeys = []string{
	"kms:EncryptionContextKeys", "kms:GrantOperations", "kms:GranteePrincipal", "kms:ScheduleKeyDeletionPendingWindowInDays",
	"aws:SourceVpc", "aws:EC2InstanceSourceVPC", "aws:PrincipalArn",
}

var (
	sidForm    = regexp.MustCompile(`^[A-Za-z0-9]+$`)
	actionForm = regexp.MustCompile(`^[a-z0-9-]+:[A-Za-z*]+$`)
	keyARNForm = regexp.MustCompile(`^arn:aws[a-z-]*:kms:[a-z]{2}(-[a-z]+)+-\d:\d{12}:(key/[0-9a-f-]{36}|alias/[A-Za-z0-9/_-]+)$`)
	s3ARNForm  = regexp.MustCompile(`^arn:aws[a-z-]*:s3:::[a-z0-9.-]{3,63}(/[\w/*.-]+)?$`)
	iamARNForm = regexp.MustCompile(`^arn:aws[a-z-]*:iam::\d{12}:(root|(role|user)/[\w+=,.@/-]+)$`)
	variable   = regexp.MustCompile(`\$\{([^}]*)\}`)
)

// ParsePolicy reads a policy as strictly as AWS does and more: an element, action, operator, condition key or form of ARN that is not known is an
// error, and all errors are told.
func ParsePolicy(kind PolicyKind, text []byte) (*Policy, error) {
	var wrong []error
	say := func(format string, args ...any) { wrong = append(wrong, fmt.Errorf(format, args...)) }

	size := len(text)
	if kind == RolePolicy || kind == ControlPolicy {
		size = len(strings.Join(strings.Fields(string(text)), ""))
	}
	if most := policySize[kind]; size > most {
		say("it has %d characters, AWS takes %d", size, most)
	}
	if err := oneObject(text); err != nil {
		return nil, err
	}
	var document struct {
		Version, ID json.RawMessage
		Statement   json.RawMessage
	}
	err := elements(text, map[string]*json.RawMessage{"Version": &document.Version, "Id": &document.ID, "Statement": &document.Statement})
	if err != nil {
		return nil, err
	}
	if string(document.Version) != `"2012-10-17"` {
		say("Version is %s, not 2012-10-17", document.Version)
	}
	var list []json.RawMessage
	if json.Unmarshal(document.Statement, &list) != nil || len(list) == 0 {
		say("Statement is no list of statements")
	}
	p := &Policy{}
	sids := map[string]bool{}
	for i, text := range list {
		s, errs := parseStatement(kind, text)
		for _, err := range errs {
			say("statement %d (%s): %w", i+1, s.Sid, err)
		}
		if sids[s.Sid] {
			say("statement %d: the Sid %q stands twice", i+1, s.Sid)
		}
		sids[s.Sid] = true
		p.Statements = append(p.Statements, s)
	}
	return p, errors.Join(wrong...)
}

// oneObject wants one JSON value, and no name twice in any of its objects.
func oneObject(text []byte) error {
	d := json.NewDecoder(bytes.NewReader(text))
	var value func(path string) error
	value = func(path string) error {
		t, err := d.Token()
		if err != nil {
			return err
		}
		names := map[string]bool{}
		switch t {
		case json.Delim('{'):
			for d.More() {
				name, err := d.Token()
				if err != nil {
					return err
				}
				at := fmt.Sprintf("%s.%v", path, name)
				if names[at] {
					return fmt.Errorf("%s stands twice", at)
				}
				names[at] = true
				if err := value(at); err != nil {
					return err
				}
			}
		case json.Delim('['):
			for i := 0; d.More(); i++ {
				if err := value(fmt.Sprintf("%s[%d]", path, i)); err != nil {
					return err
				}
			}
		default:
			return nil
		}
		_, err = d.Token() // the end
		return err
	}
	if err := value(""); err != nil {
		return err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("something follows the document")
	}
	return nil
}

// elements puts the elements of an object where they belong, and refuses others. Upper and lower case matter.
func elements(text []byte, into map[string]*json.RawMessage) error {
	var all map[string]json.RawMessage
	if err := json.Unmarshal(text, &all); err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(all)) {
		if into[name] == nil {
			return fmt.Errorf("%s is no known element", name)
		}
		*into[name] = all[name]
	}
	return nil
}

// oneOrMore is a string or a list of strings.
func oneOrMore(text json.RawMessage) ([]string, bool) {
	var one string
	if json.Unmarshal(text, &one) == nil {
		return []string{one}, one != ""
	}
	var list []string
	err := json.Unmarshal(text, &list)
	return list, err == nil && len(list) > 0 && !slices.Contains(list, "")
}

func parseStatement(kind PolicyKind, text []byte) (s Statement, wrong []error) {
	say := func(format string, args ...any) { wrong = append(wrong, fmt.Errorf(format, args...)) }
	var sid, effect, principal, action, resource, condition json.RawMessage
	if err := elements(text, map[string]*json.RawMessage{
		"Sid": &sid, "Effect": &effect, "Principal": &principal, "Action": &action, "Resource": &resource, "Condition": &condition,
	}); err != nil {
		return s, []error{err}
	}
	if json.Unmarshal(sid, &s.Sid) != nil || !sidForm.MatchString(s.Sid) {
		say("the Sid %s has other than letters and digits", sid)
	}
	switch string(effect) {
	case `"Allow"`:
		if kind == ControlPolicy {
			say("a control policy of ours only denies")
		}
	case `"Deny"`:
		s.Deny = true
	default:
		say("Effect is %s", effect)
	}
	var ok bool
	if s.Action, ok = oneOrMore(action); !ok {
		say("Action is %s", action)
	}
	for _, a := range s.Action {
		if !actionForm.MatchString(a) || !slices.ContainsFunc(slices.Concat(PolicyActions(), foreignActions), func(known string) bool { return like(a, known) }) {
			say("%s is no action", a)
		}
	}
	if s.Resource, ok = oneOrMore(resource); !ok {
		say("Resource is %s", resource)
	}
	for _, r := range s.Resource {
		if r != "*" && (kind == KeyPolicy || !keyARNForm.MatchString(r) && !s3ARNForm.MatchString(r)) {
			say("%s is no resource for a %s policy", r, kind)
		}
	}
	takesPrincipal := kind == KeyPolicy || kind == EndpointPolicy
	switch {
	case takesPrincipal && principal == nil:
		say("a %s policy needs a Principal", kind)
	case !takesPrincipal && principal != nil:
		say("a %s policy has no Principal", kind)
	case takesPrincipal:
		s.Principal = parsePrincipal(principal, say)
	}
	if condition != nil {
		s.Condition = parseCondition(condition, say)
	}
	return s, wrong
}

func parsePrincipal(text json.RawMessage, say func(string, ...any)) []string {
	if string(text) == `"*"` {
		return []string{"*"}
	}
	var aws json.RawMessage
	err := elements(text, map[string]*json.RawMessage{"AWS": &aws})
	list, ok := oneOrMore(aws)
	if err != nil || !ok {
		say("Principal is %s", text)
	}
	for _, p := range list {
		if p != "*" && !iamARNForm.MatchString(p) {
			say("%s is no principal", p)
		}
	}
	return list
}

func parseCondition(text json.RawMessage, say func(string, ...any)) map[string]map[string][]string {
	var operators map[string]map[string]json.RawMessage
	if err := json.Unmarshal(text, &operators); err != nil || len(operators) == 0 {
		say("Condition is %s", text)
	}
	all := map[string]map[string][]string{}
	for name, keys := range operators {
		all[name] = map[string][]string{}
		if _, _, ok := operator(name); !ok {
			say("%s is no operator of a condition", name)
		}
		if len(keys) == 0 {
			say("%s has no condition key", name)
		}
		for key, value := range keys {
			list, ok := oneOrMore(value)
			if !ok {
				say("%s of %s is %s", key, name, value)
			}
			if !slices.Contains(conditionKeys, key) {
				say("%s is no condition key", key)
			}
			for _, v := range list {
				for _, m := range variable.FindAllStringSubmatch(v, -1) {
					if !slices.Contains(conditionKeys, m[1]) {
						say("%s is no condition key", m[1])
					}
				}
				if name == "Null" && v != "true" && v != "false" {
					say("Null wants true or false, not %q", v)
				}
			}
			all[name][key] = list
		}
	}
	return all
}

// like is how IAM matches: * is anything, ? is one character. Actions are matched whatever their case; so are ours.
func like(pattern, s string) bool {
	form := regexp.QuoteMeta(pattern)
	form = strings.ReplaceAll(strings.ReplaceAll(form, `\*`, ".*"), `\?`, ".")
	return regexp.MustCompile("^(?i:" + form + ")$").MatchString(s)
}
