package packaging_test

import (
	"encoding/json"
	"fmt"
	"maps"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"github.com/luks-kms-agent/luks-kms-agent/keycache/kmstest"
)

// shape is what a property may be.
type shape struct {
	kind     string           // "string", "integer", "boolean", a kind of policy, "trust"; "" is an object
	list     bool             // of that
	fields   map[string]shape // of an object
	required []string
	oneOf    []string // exactly one of these
	values   []any    // that are allowed; none: all
}

// resourceType is what a type of resource has, and what Ref and GetAtt give.
type resourceType struct {
	properties shape
	attributes map[string]any
}

const (
	exampleKey  = "arn:aws:kms:us-east-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"
	exampleRole = "arn:aws:iam::111122223333:role/NODE-ROLE"
)

var (
	text   = shape{kind: "string"}
	texts  = shape{kind: "string", list: true}
	number = shape{kind: "integer"}
	truth  = shape{kind: "boolean"}
)

// The part of the resources' schemas that the template uses; what is not here is an error.
// https://docs.aws.amazon.com/AWSCloudFormation/latest/TemplateReference/aws-template-resource-type-ref.html
var resourceTypes = map[string]resourceType{
	"AWS::KMS::Key": {shape{fields: map[string]shape{
		"Description": text, "EnableKeyRotation": truth, "KeyPolicy": {kind: string(kmstest.KeyPolicy)}, "PendingWindowInDays": number,
	}}, map[string]any{"Arn": exampleKey}},
	"AWS::KMS::Alias": {shape{fields: map[string]shape{"AliasName": text, "TargetKeyId": text}, required: []string{"AliasName", "TargetKeyId"}}, nil},
	"AWS::IAM::Role": {shape{
		fields: map[string]shape{"AssumeRolePolicyDocument": {kind: "trust"}}, required: []string{"AssumeRolePolicyDocument"},
	}, map[string]any{"Arn": exampleRole}},
	"AWS::IAM::RolePolicy": {shape{
		fields:   map[string]shape{"RoleName": text, "PolicyName": text, "PolicyDocument": {kind: string(kmstest.RolePolicy)}},
		required: []string{"RoleName", "PolicyName"},
	}, nil},
	"AWS::IAM::InstanceProfile": {shape{fields: map[string]shape{"Roles": texts}, required: []string{"Roles"}},
		map[string]any{"Arn": "arn:aws:iam::111122223333:instance-profile/x"}},
	"AWS::EC2::SecurityGroup": {shape{fields: map[string]shape{
		"GroupDescription": text, "VpcId": text,
		"SecurityGroupIngress": {list: true, fields: map[string]shape{
			"Description": text, "IpProtocol": text, "FromPort": number, "ToPort": number, "SourceSecurityGroupId": text,
		}, required: []string{"IpProtocol"}},
	}, required: []string{"GroupDescription"}}, nil},
	"AWS::EC2::VPCEndpoint": {shape{fields: map[string]shape{
		"VpcEndpointType": {kind: "string", values: []any{"Interface", "Gateway", "GatewayLoadBalancer"}},
		"ServiceName":     text, "VpcId": text, "SubnetIds": texts, "SecurityGroupIds": texts, "PrivateDnsEnabled": truth,
		"PolicyDocument": {kind: string(kmstest.EndpointPolicy)},
	}, required: []string{"ServiceName", "VpcId"}}, nil},
	"AWS::EC2::LaunchTemplate": {shape{fields: map[string]shape{"LaunchTemplateData": {
		fields: map[string]shape{
			"ImageId": text, "SecurityGroupIds": texts,
			"IamInstanceProfile": {fields: map[string]shape{"Arn": text, "Name": text}, oneOf: []string{"Arn", "Name"}},
			"MetadataOptions": {fields: map[string]shape{
				"HttpEndpoint": {kind: "string", values: []any{"enabled", "disabled"}},
				"HttpTokens":   {kind: "string", values: []any{"required", "optional"}}, "HttpPutResponseHopLimit": number,
			}},
			"BlockDeviceMappings": {list: true, fields: map[string]shape{"DeviceName": text, "VirtualName": text}, required: []string{"DeviceName", "VirtualName"}},
		},
		oneOf: []string{"SecurityGroupIds", "SecurityGroups", "NetworkInterfaces"},
	}}, required: []string{"LaunchTemplateData"}}, map[string]any{"LatestVersionNumber": "1"}},
}

// parameterTypes are those of parameters, with a value of each.
var parameterTypes = map[string]any{
	"String": "x", "CommaDelimitedList": []any{"x"},
}

var pseudoParameters = map[string]string{"AWS::Partition": "aws", "AWS::AccountId": "111122223333", "AWS::Region": "us-east-1"}

// template is one that is being judged.
type template struct {
	Version     string               `yaml:"AWSTemplateFormatVersion"`
	Description string               `yaml:"Description"`
	Parameters  map[string]parameter `yaml:"Parameters"`
	Conditions  map[string]yaml.Node `yaml:"Conditions"`
	Resources   map[string]resource  `yaml:"Resources"`
	Outputs     map[string]output    `yaml:"Outputs"`

	wrong []string
	at    string          // where a fault is
	by    string          // the resource that is being looked at, "" outside
	when  string          // the condition of the resource or output that is being looked at
	used  map[string]bool // parameters and conditions
	needs map[string][]string
}

type parameter struct {
	Type           string `yaml:"Type"`
	Default        string `yaml:"Default"`
	Description    string `yaml:"Description"`
	AllowedPattern string `yaml:"AllowedPattern"`
}

type resource struct {
	Type                string    `yaml:"Type"`
	Condition           string    `yaml:"Condition"`
	DeletionPolicy      string    `yaml:"DeletionPolicy"`
	UpdateReplacePolicy string    `yaml:"UpdateReplacePolicy"`
	Properties          yaml.Node `yaml:"Properties"`
}

type output struct {
	Description string    `yaml:"Description"`
	Condition   string    `yaml:"Condition"`
	Value       yaml.Node `yaml:"Value"`
}

func (t *template) say(format string, args ...any) {
	t.wrong = append(t.wrong, t.at+": "+fmt.Sprintf(format, args...))
}

// judgeTemplate returns the properties of each resource, with all functions carried out, and what is wrong.
func judgeTemplate(source string) (resources map[string]any, wrong []string) {
	t := &template{used: map[string]bool{}, needs: map[string][]string{}}
	d := yaml.NewDecoder(strings.NewReader(source))
	d.KnownFields(true) // and no name twice
	if err := d.Decode(t); err != nil {
		return nil, []string{err.Error()}
	}
	t.at = "template"
	if t.Version != "2010-09-09" || len(t.Resources) == 0 {
		t.say("version %q, %d resources", t.Version, len(t.Resources))
	}
	for name, p := range t.Parameters {
		t.at = name
		if _, ok := parameterTypes[p.Type]; !ok {
			t.say("%s is no type of a parameter", p.Type)
		}
		if pattern, err := regexp.Compile(p.AllowedPattern); err != nil || !pattern.MatchString(p.Default) {
			t.say("the default %q is not allowed (%v)", p.Default, err)
		}
	}
	for name, node := range t.Conditions {
		t.at = name
		if _, ok := t.value(&node).(bool); !ok {
			t.say("it is no condition")
		}
	}
	resources = map[string]any{}
	for name, r := range t.Resources {
		t.at, t.by = name, name
		known, ok := resourceTypes[r.Type]
		if !ok {
			t.say("%s is no known type", r.Type)
		}
		t.on(r.Condition)
		for _, p := range []string{r.DeletionPolicy, r.UpdateReplacePolicy} {
			if !slices.Contains([]string{"", "Delete", "Retain", "Snapshot"}, p) {
				t.say("%s is no policy of deletion", p)
			}
		}
		resources[name] = t.value(&r.Properties)
		if ok {
			t.fits(resources[name], known.properties, name)
		}
	}
	t.by = ""
	for name, o := range t.Outputs {
		t.at = "output " + name
		t.on(o.Condition)
		if _, ok := t.value(&o.Value).(string); !ok {
			t.say("it is no string")
		}
	}
	t.at = "template"
	for name := range t.Parameters {
		if !t.used[name] {
			t.say("the parameter %s is not used", name)
		}
	}
	for name := range t.Conditions {
		if !t.used[name] {
			t.say("the condition %s is not used", name)
		}
	}
	for name := range t.Resources {
		t.circle(name, nil)
	}
	slices.Sort(t.wrong)
	return resources, t.wrong
}

// on notes the condition on which what is being looked at is there.
func (t *template) on(condition string) {
	if _, ok := t.Conditions[condition]; !ok && condition != "" {
		t.say("there is no condition %s", condition)
	}
	t.when, t.used[condition] = condition, true
}

// circle looks for resources that need each other.
func (t *template) circle(name string, path []string) {
	if slices.Contains(path, name) {
		t.say("a circle: %s", strings.Join(append(path, name), " needs "))
		return
	}
	for _, next := range t.needs[name] {
		t.circle(next, append(path, name))
	}
}

// value is what a node stands for, functions carried out.
func (t *template) value(n *yaml.Node) any {
	switch n.Tag {
	case "!Ref":
		return t.ref(n.Value)
	case "!GetAtt":
		name, attribute, _ := strings.Cut(n.Value, ".")
		r, ok := t.Resources[name]
		value := resourceTypes[r.Type].attributes[attribute]
		if !ok || value == nil {
			t.say("there is no %s", n.Value)
			return ""
		}
		t.need(name)
		return value
	case "!Sub":
		return regexp.MustCompile(`\$\{([^}]*)\}`).ReplaceAllStringFunc(n.Value, func(v string) string {
			s, ok := t.ref(strings.Trim(v, "${}")).(string)
			if !ok {
				t.say("%s of a !Sub is no string", v)
			}
			return s
		})
	case "!Not":
		v, ok := t.value(n.Content[0]).(bool)
		if !ok || len(n.Content) != 1 {
			t.say("!Not of no condition")
		}
		return !v
	case "!Equals":
		return len(n.Content) == 2 && reflect.DeepEqual(t.value(n.Content[0]), t.value(n.Content[1]))
	case "!Join":
		list, ok := t.value(n.Content[1]).([]any)
		if !ok || len(n.Content) != 2 {
			t.say("!Join of no list")
		}
		return fmt.Sprint(list...)
	}
	if strings.HasPrefix(n.Tag, "!") && !strings.HasPrefix(n.Tag, "!!") {
		t.say("%s is no known function", n.Tag)
		return nil
	}
	switch n.Kind {
	case yaml.MappingNode:
		m := map[string]any{}
		for i := 0; i < len(n.Content); i += 2 {
			if m[n.Content[i].Value] != nil {
				t.say("%s stands twice", n.Content[i].Value)
			}
			m[n.Content[i].Value] = t.value(n.Content[i+1])
		}
		return m
	case yaml.SequenceNode:
		list := []any{}
		for _, c := range n.Content {
			list = append(list, t.value(c))
		}
		return list
	}
	var v any
	if err := n.Decode(&v); err != nil {
		t.say("%v", err)
	}
	return v
}

func (t *template) ref(name string) any {
	if v, ok := pseudoParameters[name]; ok {
		return v
	}
	if p, ok := t.Parameters[name]; ok {
		t.used[name] = true
		if p.Type == "String" && p.Default != "" {
			return p.Default
		}
		return parameterTypes[p.Type]
	}
	if _, ok := t.Resources[name]; !ok {
		t.say("there is no %s", name)
	}
	t.need(name)
	return name
}

// need notes that the resource that is being looked at needs another, which has to be there whenever it is.
func (t *template) need(name string) {
	other := t.Resources[name].Condition
	if other != "" && other != t.when {
		t.say("%s may not be there", name)
	}
	if t.by != "" {
		t.needs[t.by] = append(t.needs[t.by], name)
	}
}

func (t *template) fits(value any, s shape, at string) {
	say := func(format string, args ...any) { t.at = at; t.say(format, args...) }
	if s.list {
		list, ok := value.([]any)
		if !ok || len(list) == 0 {
			say("%v is no list", value)
		}
		s.list = false
		for i, v := range list {
			t.fits(v, s, fmt.Sprintf("%s[%d]", at, i))
		}
		return
	}
	ok := true
	switch s.kind {
	case "string":
		_, ok = value.(string)
	case "integer":
		_, ok = value.(int)
	case "boolean":
		_, ok = value.(bool)
	case "":
		var m map[string]any
		if m, ok = value.(map[string]any); ok {
			t.fitsObject(m, s, at)
		}
	case "trust":
		want := map[string]any{"Version": "2012-10-17", "Statement": []any{map[string]any{
			"Sid": "Instances", "Effect": "Allow", "Principal": map[string]any{"Service": "ec2.amazonaws.com"}, "Action": "sts:AssumeRole",
		}}}
		ok = reflect.DeepEqual(value, want)
	default:
		document, err := json.Marshal(value)
		if err == nil {
			_, err = kmstest.ParsePolicy(kmstest.PolicyKind(s.kind), document)
		}
		if err != nil {
			say("%v", err)
		}
	}
	if !ok {
		say("%v is no %s", value, s.kind)
	}
	if s.values != nil && !slices.Contains(s.values, value) {
		say("%v is none of %v", value, s.values)
	}
}

func (t *template) fitsObject(m map[string]any, s shape, at string) {
	t.at = at
	for _, name := range s.required {
		if m[name] == nil {
			t.say("%s is missing", name)
		}
	}
	if s.oneOf != nil {
		n := 0
		for _, name := range s.oneOf {
			if m[name] != nil {
				n++
			}
		}
		if n != 1 {
			t.say("it has %d of %v, not one", n, s.oneOf)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(m)) {
		of, ok := s.fields[name]
		if !ok {
			t.at = at
			t.say("there is no property %s", name)
			continue
		}
		t.fits(m[name], of, at+"."+name)
	}
}

// The template is sound, its policies are those of the files, and it does what is said of it.
func TestCloudFormation(t *testing.T) {
	source := read(t, "policies/cloudformation.yaml")
	resources, wrong := judgeTemplate(source)
	for _, w := range wrong {
		t.Error(w)
	}
	get := func(path string) any {
		var v any = resources
		for name := range strings.SplitSeq(path, ".") {
			m, _ := v.(map[string]any)
			v = m[name]
		}
		return v
	}
	for path, file := range map[string]string{
		"NodePolicy.PolicyDocument": "node-role.json", "Key.KeyPolicy": "key-policy.json", "Endpoint.PolicyDocument": "vpc-endpoint-policy.json",
	} {
		var want any
		if err := json.Unmarshal([]byte(read(t, "policies/"+file)), &want); err != nil {
			t.Fatal(err)
		}
		if got := get(path); !reflect.DeepEqual(got, want) {
			t.Errorf("%s is not %s:\n%v\n%v", path, file, got, want)
		}
	}
	for path, want := range map[string]any{
		"LaunchTemplate.LaunchTemplateData.MetadataOptions": map[string]any{"HttpEndpoint": "enabled", "HttpTokens": "required", "HttpPutResponseHopLimit": 1},
		"LaunchTemplate.LaunchTemplateData.UserData":        nil,
		"Key.PendingWindowInDays":                           30,
		"Alias.AliasName":                                   "alias/luks-kms-agent",
		"Key.EnableKeyRotation":                             true,
		"Endpoint.PrivateDnsEnabled":                        true,
		"Endpoint.ServiceName":                              "com.amazonaws.us-east-1.kms",
	} {
		if got := get(path); !reflect.DeepEqual(got, want) {
			t.Errorf("%s is %v, want %v", path, got, want)
		}
	}
	if strings.Count(source, "DeletionPolicy: Retain\n    UpdateReplacePolicy: Retain\n") != 1 {
		t.Error("the key goes with the stack")
	}
}

func TestBrokenTemplatesAreSeen(t *testing.T) {
	source := read(t, "policies/cloudformation.yaml")
	for _, c := range []struct{ from, to, says string }{
		{"2010-09-09", "2010-09-10", "version"},
		{"Parameters:\n", "Parameter:\n", "field Parameter not found"},
		{"Type: CommaDelimitedList", "Type: AWS::EC2::Image", "no type of a parameter"},
		{"Type: AWS::KMS::Alias", "Type: AWS::KMS::Name", "no known type"},
		{"Default: alias/luks-kms-agent", "Default: luks-kms-agent", "is not allowed"},
		{"  Alias:\n", "  Key:\n", "already defined"},
		{"!Ref VpcId", "!Ref Vpc", "there is no Vpc"},
		{"!GetAtt Key.Arn", "!GetAtt Key.ARN", "there is no Key.ARN"},
		{"${AWS::Partition}", "${AWS::Partitions}", "there is no AWS::Partitions"},
		{"!Sub com", "!Substitute com", "no known function"},
		{"AliasName: !Ref AliasName", "AliasName: alias/x", "AliasName is not used"},
		{"Condition: WithEndpoint\n    Properties:\n      VpcEndpoint", "Condition: WithEndpoints\n    Properties:\n      VpcEndpoint", "no condition WithEndpoints"},
		{"Condition: WithEndpoint\n    Properties:\n      VpcEndpoint", "Properties:\n      VpcEndpoint", "EndpointSecurityGroup may not be there"},
		{"Condition: WithImage\n    Value", "Value", "LaunchTemplate may not be there"},
		{"Default: \"\"\n    AllowedPattern: ^(ami", "Default: image\n    AllowedPattern: ^(ami", "is not allowed"},
		{"DeletionPolicy: Retain", "DeletionPolicy: Keep", "no policy of deletion"},
		{"EnableKeyRotation:", "KeyRotation:", "no property KeyRotation"},
		{"PendingWindowInDays: 30", "PendingWindowInDays: a month", "is no integer"},
		{"TargetKeyId: !Ref Key", "Description: x", "TargetKeyId is missing"},
		{"Roles: [!Ref NodeRole]", "Roles: !Ref NodeRole", "is no list"},
		{"HttpTokens: required", "HttpTokens: always", "none of"},
		{"SecurityGroupIds: [!Ref NodeSecurityGroupId]", "SecurityGroupIds: [!Ref NodeSecurityGroupId]\n        SecurityGroups: [x]", "2 of"},
		{"kms:GenerateDataKey,", "kms:GenerateKey,", "is no action"},
		{"Principal: {Service: ec2.amazonaws.com}", "Principal: {Service: ec2.amazon.com}", "is no trust"},
		{"RoleName: !Ref NodeRole", "RoleName: !Ref NodePolicy", "a circle"},
		{"Value: !Ref LaunchTemplate", "Value: [x]", "it is no string"},
	} {
		if !strings.Contains(source, c.from) {
			t.Errorf("the template has no %q", c.from)
		}
		_, wrong := judgeTemplate(strings.Replace(source, c.from, c.to, 1))
		if !slices.ContainsFunc(wrong, func(w string) bool { return strings.Contains(w, c.says) }) {
			t.Errorf("with %q: %q, want %q", c.to, wrong, c.says)
		}
	}
}
